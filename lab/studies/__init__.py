"""What docs/budgets.md claims, measured again on any model: promises, texts from elsewhere, deadlines."""
