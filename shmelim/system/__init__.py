"""The ground floor: processes, forks, durable files and logs, which know nothing of what is built on them."""
