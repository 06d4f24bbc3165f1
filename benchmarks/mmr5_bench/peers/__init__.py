"""Other ways to run the same model on the same lists, in the same run, behind one interface."""
