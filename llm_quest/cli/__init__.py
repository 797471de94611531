"""The command line, `quest`. Commands import what they need when they run, so that `quest --help` is
quick."""
