"""What an append or a read costs, as a ratio to what it would cost at the least, and to what others cost."""
