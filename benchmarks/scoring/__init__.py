"""How well scores choose: the product's importance beside its rivals', judged on labelled tasks."""
