"""The commands of the command line, one file each; `options.py` has what several share."""
