"""What runs have in common and what sets them apart, as numbers and figures."""
