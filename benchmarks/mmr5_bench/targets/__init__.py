"""The targets of the GPU engine, each measured under several configurations in one run."""
