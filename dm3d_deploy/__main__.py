"""`python -m dm3d_deploy` is the command `dm3d-deploy`."""

from dm3d_deploy.cli import main

if __name__ == "__main__":
    main()
