"""The commands of the command line, a file each; `options.py` has what several share."""
