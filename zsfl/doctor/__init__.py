"""`zsfl doctor`: why nodes do not find one another, or do not run. Some modules look, others judge what was seen."""
