"""From a picture to a larger picture, in one process or several.

upscaler: the stages prepare, denoise and finish, and the loop over them.
batching: one expert on the tiles of several requests at once.
state: the data that travels between the stages.
codec: from the bytes of a file to the bytes of a file.
notes: what a user must know about a file that was read.
sizes, memory, device: result sizes; memory estimates and errors; the choice of device and dtype.
"""
