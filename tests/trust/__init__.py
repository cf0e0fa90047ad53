"""What is refused, what is published, and that nothing is ever half written."""
