"""Who a machine is: its key pair, the keys that it trusts, and the tokens by which two machines are paired."""
