"""`zsfl bench`: what this machine and its network do, before a job relies on them."""
