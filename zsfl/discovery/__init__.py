"""Who else is there: hints about addresses (mDNS, seeds, peer exchange) and the table that judges them."""
