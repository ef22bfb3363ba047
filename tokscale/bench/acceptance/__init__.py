"""What `bench gpu` runs: sections that each yield rows, the process that runs them, and the folder they end up in."""
