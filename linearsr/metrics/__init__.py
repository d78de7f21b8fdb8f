"""Quality metrics of pictures, through pyiqa and lpips."""
