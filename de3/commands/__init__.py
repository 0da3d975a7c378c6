"""The commands of the command line, one file each; `options.py` has the options and checks that several share."""
