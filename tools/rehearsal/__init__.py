"""The whole story through `ray job submit`, on this machine or on a real cluster."""
