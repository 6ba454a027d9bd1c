"""The reproduction of Liusie, Fathullah and Gales (Findings of ACL 2024): its data, models, runs, tables and figures."""
