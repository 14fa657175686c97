"""What must be so, one function for each promise. Each answers what it saw, in words,
and raises `Failed` if it is otherwise."""
