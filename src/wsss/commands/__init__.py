"""One file a verb: arguments, call, exit status."""
