"""`python -m eval.firstday`: what a new user's first requests get out of moved KV."""
