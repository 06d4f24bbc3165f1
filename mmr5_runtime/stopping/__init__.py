"""Reading an answer while it is written: when it is known, what may come next, how sure it is."""
