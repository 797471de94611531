"""The command line, `quest`. A command imports what it needs when it runs, so that `quest --help` is fast."""
