import sys

from svqvae_cli import main

sys.exit(main())
