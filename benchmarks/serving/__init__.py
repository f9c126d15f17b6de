"""Real inference servers on this machine, for tests and for measuring what a pruned model gains behind one."""
