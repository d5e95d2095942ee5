//! Credentials for `ve`, handed to it through its environment.
//!
//! `VOLCENGINE_ACCESS_KEY_ID`, `VOLCENGINE_SECRET_ACCESS_KEY` and `VOLCENGINE_REGION`, else the keys `access_key_id`,
//! `secret_access_key` and `region` of `~/.volcengine/config.json`. `ve` itself calls the first two variables
//! `VOLCENGINE_ACCESS_KEY` and `VOLCENGINE_SECRET_KEY`, and keeps profiles in the same file
//! (<https://github.com/volcengine/volcengine-cli>, Authentication): it is given both spellings, and where it has
//! means of its own it is left to them.

use std::path::{Path, PathBuf};

use serde_json::Value;

/// Variables by which `ve` finds credentials by itself: its own spelling of the key, a profile, an OIDC role, the role
/// of the instance.
const OWN_MEANS: [&str; 5] = [
    "VOLCENGINE_ACCESS_KEY",
    "VOLCENGINE_PROFILE",
    "VOLCSTACK_PROFILE",
    "VOLCENGINE_OIDC_ROLE_TRN",
    "VOLCENGINE_ECS_METADATA",
];

const ID: &str = "VOLCENGINE_ACCESS_KEY_ID";
const SECRET: &str = "VOLCENGINE_SECRET_ACCESS_KEY";
const REGION: &str = "VOLCENGINE_REGION";

/// Why there are no credentials.
#[derive(Debug, thiserror::Error)]
pub enum CredentialsError {
    /// None anywhere.
    #[error(
        "no Volcengine credentials: set {ID}, {SECRET} and {REGION}, or put `access_key_id`, `secret_access_key` and \
         `region` into {}", .file.display()
    )]
    Missing {
        /// The file that was looked for.
        file: PathBuf,
    },
    /// A key without its secret.
    #[error("the Volcengine credentials of {place} have an access key id and no secret: {missing} is missing")]
    NoSecret {
        /// Where the access key id is from.
        place: String,
        /// The variable or key that is missing.
        missing: &'static str,
    },
    /// The file cannot be read.
    #[error("cannot read the Volcengine credentials in {}; correct the file, or set {ID}, {SECRET} and {REGION}", .file.display())]
    Unreadable {
        /// The file.
        file: PathBuf,
        /// What the system or the parser said.
        source: std::io::Error,
    },
}

/// The environment for `ve`; the region may still be missing from it.
pub type Environment = Vec<(String, String)>;

/// Finds the credentials in the environment, else in the home folder's file.
///
/// # Errors
/// [`CredentialsError`], naming the variables and the file.
pub fn find() -> Result<Environment, CredentialsError> {
    let home = std::env::var_os("HOME").filter(|home| !home.is_empty()).map(PathBuf::from).or_else(|| {
        // A service started by systemd or cron may have no HOME.
        nix::unistd::User::from_uid(nix::unistd::geteuid()).ok().flatten().map(|user| user.dir)
    });
    let file = home.unwrap_or_else(|| PathBuf::from("/root")).join(".volcengine/config.json");
    let read = || match std::fs::read(&file) {
        Ok(bytes) => Ok(Some(bytes)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(source) => Err(CredentialsError::Unreadable { file: file.clone(), source }),
    };
    choose(|name| std::env::var(name).ok().filter(|value| !value.is_empty()), &file, read)
}

/// Whether the environment names the region.
#[must_use]
pub fn has_region(environment: &Environment) -> bool {
    environment.iter().any(|(key, _)| key == REGION)
}

/// The region of a zone: `cn-beijing-a` is in `cn-beijing`, `ap-southeast-1a` in `ap-southeast-1`.
#[must_use]
pub fn region_of(zone: &str) -> &str {
    zone.trim_end_matches(|c: char| c.is_ascii_lowercase()).trim_end_matches('-')
}

/// The region as a variable.
#[must_use]
pub fn region(region: &str) -> (String, String) {
    (REGION.to_owned(), region.to_owned())
}

fn choose(
    variable: impl Fn(&str) -> Option<String>,
    file: &Path,
    read: impl FnOnce() -> Result<Option<Vec<u8>>, CredentialsError>,
) -> Result<Environment, CredentialsError> {
    if let Some(id) = variable(ID) {
        let secret = variable(SECRET)
            .ok_or_else(|| CredentialsError::NoSecret { place: "the environment".to_owned(), missing: SECRET })?;
        return Ok(environment(&id, &secret, variable(REGION)));
    }
    if OWN_MEANS.iter().any(|name| variable(name).is_some()) {
        return Ok(own_means(variable(REGION)));
    }
    let missing = || CredentialsError::Missing { file: file.to_owned() };
    let bytes = read()?.ok_or_else(missing)?;
    let json: Value = serde_json::from_slice(&bytes)
        .map_err(|error| CredentialsError::Unreadable { file: file.to_owned(), source: error.into() })?;
    let key = |name: &str| json.get(name).and_then(Value::as_str).filter(|text| !text.is_empty()).map(str::to_owned);
    let region_name = || variable(REGION).or_else(|| key("region"));
    match (key("access_key_id"), key("secret_access_key")) {
        (Some(id), Some(secret)) => Ok(environment(&id, &secret, region_name())),
        (Some(_), None) => {
            Err(CredentialsError::NoSecret { place: file.display().to_string(), missing: "secret_access_key" })
        }
        // A file with profiles is `ve`'s own.
        (None, _) if json.get("profiles").and_then(Value::as_object).is_some_and(|profiles| !profiles.is_empty()) => {
            Ok(own_means(variable(REGION)))
        }
        (None, _) => Err(missing()),
    }
}

/// What `ve` is told where it finds credentials by itself.
fn own_means(region_name: Option<String>) -> Environment {
    region_name.iter().map(|name| region(name)).collect()
}

fn environment(id: &str, secret: &str, region_name: Option<String>) -> Environment {
    let pairs = [(ID, id), ("VOLCENGINE_ACCESS_KEY", id), (SECRET, secret), ("VOLCENGINE_SECRET_KEY", secret)];
    let mut environment: Environment = pairs.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    environment.extend(region_name.iter().map(|name| region(name)));
    environment
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"{"access_key_id":"AKfile","secret_access_key":"SKfile","region":"cn-shanghai"}"#;

    fn chosen(variables: &[(&str, &str)], file: Option<&str>) -> Result<Environment, String> {
        let variable =
            |name: &str| variables.iter().find(|(key, _)| *key == name).map(|(_, value)| (*value).to_owned());
        let file = file.map(|text| text.as_bytes().to_vec());
        choose(variable, Path::new("/root/.volcengine/config.json"), || Ok(file)).map_err(|error| error.to_string())
    }

    fn value<'a>(environment: &'a Environment, key: &str) -> Option<&'a str> {
        environment.iter().find(|(name, _)| name == key).map(|(_, value)| value.as_str())
    }

    #[test]
    fn the_environment_comes_before_the_file() {
        let both = chosen(&[(ID, "AKenv"), (SECRET, "SKenv"), (REGION, "cn-beijing")], Some(FILE)).unwrap();
        assert_eq!(value(&both, ID), Some("AKenv"));
        assert_eq!(value(&both, "VOLCENGINE_ACCESS_KEY"), Some("AKenv"));
        assert_eq!(value(&both, "VOLCENGINE_SECRET_KEY"), Some("SKenv"));
        assert_eq!(value(&both, REGION), Some("cn-beijing"));
    }

    #[test]
    fn the_file_is_handed_over_as_variables() {
        let file = chosen(&[], Some(FILE)).unwrap();
        assert_eq!(value(&file, ID), Some("AKfile"));
        assert_eq!(value(&file, SECRET), Some("SKfile"));
        assert_eq!(value(&file, REGION), Some("cn-shanghai"));
        let elsewhere = chosen(&[(REGION, "cn-beijing")], Some(FILE)).unwrap();
        assert_eq!(value(&elsewhere, REGION), Some("cn-beijing"));
    }

    #[test]
    fn missing_credentials_are_named_variables_and_file() {
        for file in [None, Some("{}"), Some(r#"{"region":"cn-beijing","profiles":{}}"#)] {
            let error = chosen(&[(REGION, "cn-beijing")], file).unwrap_err();
            for name in [ID, SECRET, REGION, "/root/.volcengine/config.json", "access_key_id"] {
                assert!(error.contains(name), "{name}: {error}");
            }
        }
    }

    #[test]
    fn a_key_without_its_secret_says_which_is_missing() {
        assert!(chosen(&[(ID, "AK")], None).unwrap_err().contains(SECRET));
        assert!(chosen(&[], Some(r#"{"access_key_id":"AK"}"#)).unwrap_err().contains("secret_access_key"));
    }

    #[test]
    fn a_broken_file_is_named() {
        assert!(chosen(&[], Some("{")).unwrap_err().contains("config.json"));
    }

    #[test]
    fn what_ve_finds_by_itself_is_left_to_it() {
        let profiles = r#"{"current":"prod","profiles":{"prod":{"mode":"ak","access-key":"AK","secret-key":"SK"}}}"#;
        assert_eq!(chosen(&[], Some(profiles)).unwrap(), Vec::new());
        for means in OWN_MEANS {
            assert_eq!(chosen(&[(means, "x"), (REGION, "cn-beijing")], None).unwrap(), [region("cn-beijing")]);
        }
    }

    #[test]
    fn a_region_can_be_told_from_its_zone() {
        assert_eq!(region_of("cn-beijing-a"), "cn-beijing");
        assert_eq!(region_of("ap-southeast-1a"), "ap-southeast-1");
        assert!(has_region(&vec![region("cn-beijing")]) && !has_region(&Vec::new()));
    }
}
