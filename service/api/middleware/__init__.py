"""What stands before the routes: authentication, rates, headers, the request log."""
