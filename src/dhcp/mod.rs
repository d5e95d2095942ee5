//! The DHCP server: a pure engine, a durable lease store, a loop that runs effects.
