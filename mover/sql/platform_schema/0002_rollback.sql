-- A switched tenant can be brought back; what he leaves on the target is cleared a day later.

alter table platform.tenant_migrations drop constraint tenant_migrations_wish_check;
alter table platform.tenant_migrations add constraint tenant_migrations_wish_check
    check (wish in ('pause', 'cancel', 'rollback'));

drop index platform.tenant_migrations_tombstones;
create index tenant_migrations_over on platform.tenant_migrations (tombstone_check_at)
    where status in ('completed', 'rolled_back');
