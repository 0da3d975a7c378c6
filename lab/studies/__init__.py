"""Studies of any model: certificates, audits, out-of-distribution texts, long texts, deadlines, time."""
