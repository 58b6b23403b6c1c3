"""Web pages of the gateway: playground, dashboard, sign-in."""
