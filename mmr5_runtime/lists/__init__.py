"""Lists longer than one prompt: which pages are shown together, and how windows add up."""
