"""What an elimination owes: the states of a debt, and the tables that hold them."""
