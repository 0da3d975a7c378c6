"""Audits: some texts of live traffic also run to full depth, which tells how often early answers differ from it."""
