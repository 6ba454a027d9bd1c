"""Teachers that only an API reaches: calls and their plan, the endpoint and its budget, the store of paid replies."""
