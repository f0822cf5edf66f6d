"""What a run will take, from its configuration and the shapes of its models: memory, tokens, time, money, disk; and how it scales."""
