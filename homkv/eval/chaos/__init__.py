"""What a service does under faults: one end for every request, nothing wrong answered, nothing kept."""
