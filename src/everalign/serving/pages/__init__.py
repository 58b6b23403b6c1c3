"""What people see of a gateway in a browser: a playground at `/`, a dashboard, and how to sign in."""
