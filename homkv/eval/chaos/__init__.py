"""What a service does under faults: every request ends once and is told so, nothing wrong is answered, nothing is kept."""
