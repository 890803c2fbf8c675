"""What can be done about sums that may overflow their accumulator, from the one that costs least to the last resort."""
