"""Chat History Database: the service in which AI agents keep their conversations."""
