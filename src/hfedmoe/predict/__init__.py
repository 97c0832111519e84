"""`hfedmoe predict`: label and probabilities for rows without labels, by a run or by what was exported of it."""
