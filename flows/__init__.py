"""The application: configuration, command line, and one Prefect flow a file."""
