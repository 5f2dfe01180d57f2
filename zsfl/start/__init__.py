"""What somebody needs who begins: the files of a new project, and completion in the shell."""
