"""What training loops of other libraries need beside `GroupLearner`; a module is imported only where it is used."""
