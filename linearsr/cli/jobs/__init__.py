"""The jobs of `linearsr job`, a module each: its flags, and the function that runs it.

`add_flags(parser)` adds the flags. `run(options)` runs the job, and returns its exit code or None.
PLACES: flags for folders that every node must see; `--submit` makes local ones absolute. SENT:
flags for files and folders of the user's machine, which `--submit` sends along if they are small.
A job that cannot be submitted has neither.
"""
