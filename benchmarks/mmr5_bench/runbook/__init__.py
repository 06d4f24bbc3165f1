"""Everything that needs a GPU, measured by one command: steps in order, each bounded in time."""
