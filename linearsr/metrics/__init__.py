"""Quality: metrics of pictures, through pyiqa."""
