"""`zsfl plan`: what a job will do on so many machines, before they are there."""
