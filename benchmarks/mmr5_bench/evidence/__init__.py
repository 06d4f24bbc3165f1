"""What every measurement is made of, and the one document that all of them end in."""
