"""From a picture to a larger picture, in one process or several."""
