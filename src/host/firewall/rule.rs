//! One iptables rule as a value that can be compared, whatever order its options are printed in.

use std::hash::{Hash, Hasher};

/// Comment of the rules that drop VM traffic.
pub const DROP_TAG: &str = "cocoon-net-drop";

/// Comment of every other rule of ours.
pub const TAG: &str = "cocoon-net";

/// A rule specification: everything that follows `-A CHAIN` in `iptables-save(8)`.
///
/// Two rules are equal when they hold the same options with the same arguments and negations, in any order.
#[derive(Debug, Clone)]
pub struct Rule {
    text: String,
    options: Vec<Vec<String>>,
}

/// A rule whose words cannot be told apart: a quote that never closes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot read the rule `{0}`: a quote is not closed")]
pub struct RuleError(String);

impl Rule {
    /// Reads the text of a rule, as `iptables-save` prints and `iptables-restore` reads it.
    ///
    /// # Errors
    /// [`RuleError`] when a quote is not closed.
    pub fn parse(text: &str) -> Result<Self, RuleError> {
        let words = words(text).ok_or_else(|| RuleError(text.to_owned()))?;
        Ok(Self { text: text.to_owned(), options: options(words) })
    }

    /// A rule whose words hold neither blanks nor quotes, as those that we make of validated parts.
    #[must_use]
    pub fn unquoted(text: String) -> Self {
        let words = text.split_whitespace().map(|word| Word { text: word.to_owned(), quoted: false }).collect();
        Self { options: options(words), text }
    }

    /// The rule as text.
    #[must_use]
    pub fn text(&self) -> &str {
        &self.text
    }

    /// Whether the rule is ours: it has one comment, and that equals one of our tags.
    #[must_use]
    pub fn is_ours(&self) -> bool {
        matches!(self.comment(), Some(DROP_TAG | TAG))
    }

    /// Whether the rule is ours and drops VM traffic.
    #[must_use]
    pub fn is_our_drop(&self) -> bool {
        self.comment() == Some(DROP_TAG)
    }

    /// The argument of an option that is there once and not negated.
    #[must_use]
    pub fn argument(&self, option: &str) -> Option<&str> {
        let mut groups = self.options.iter().filter(|group| name_of(group) == option);
        match (groups.next().map(Vec::as_slice), groups.next()) {
            (Some([name, argument]), None) if name == option => Some(argument),
            _ => None,
        }
    }

    /// Whether the rule mentions the ipset of this name.
    #[must_use]
    pub fn uses_set(&self, set: &str) -> bool {
        self.options.iter().any(|group| name_of(group) == "--match-set" && group.iter().any(|word| word == set))
    }

    fn comment(&self) -> Option<&str> {
        self.argument("--comment")
    }
}

impl PartialEq for Rule {
    fn eq(&self, other: &Self) -> bool {
        self.options == other.options
    }
}

impl Eq for Rule {}

impl Hash for Rule {
    fn hash<H: Hasher>(&self, state: &mut H) {
        self.options.hash(state);
    }
}

/// The name of an option group, without its negation.
fn name_of(group: &[String]) -> &str {
    let words = if group.first().is_some_and(|word| word == "!") { &group[1..] } else { group };
    words.first().map_or("", String::as_str)
}

/// A word and whether it was quoted: a quoted word is never an option.
struct Word {
    text: String,
    quoted: bool,
}

/// Splits a line the way `iptables-restore` does: blanks separate, double quotes group, and within them a backslash
/// takes the next character as it is. `None` when a quote is not closed.
fn words(line: &str) -> Option<Vec<Word>> {
    let mut words = Vec::new();
    let mut chars = line.chars().peekable();
    while let Some(&first) = chars.peek() {
        if first.is_whitespace() {
            chars.next();
            continue;
        }
        let mut word = Word { text: String::new(), quoted: false };
        while let Some(&next) = chars.peek() {
            if next.is_whitespace() {
                break;
            }
            chars.next();
            if next != '"' {
                word.text.push(next);
                continue;
            }
            word.quoted = true;
            loop {
                match chars.next()? {
                    '"' => break,
                    '\\' => word.text.push(chars.next()?),
                    other => word.text.push(other),
                }
            }
        }
        words.push(word);
    }
    Some(words)
}

/// Groups words into options with their arguments, a leading `!` with the option it negates, and sorts the groups.
fn options(words: Vec<Word>) -> Vec<Vec<String>> {
    let mut groups: Vec<Vec<String>> = Vec::new();
    let mut negated = false;
    for word in words {
        let after_comment = groups.last().is_some_and(|group| group.len() == 1 && group[0] == "--comment");
        if !word.quoted && !after_comment && word.text == "!" {
            negated = true;
        } else if !word.quoted && !after_comment && word.text.starts_with('-') && word.text.len() > 1 {
            let mut group = Vec::with_capacity(2);
            if std::mem::take(&mut negated) {
                group.push("!".to_owned());
            }
            group.push(word.text);
            groups.push(group);
        } else {
            match groups.last_mut() {
                Some(group) => group.push(word.text),
                None => groups.push(vec![word.text]),
            }
        }
    }
    groups.sort_unstable();
    groups
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rule(text: &str) -> Rule {
        Rule::parse(text).unwrap()
    }

    #[test]
    fn the_order_of_options_does_not_matter() {
        assert_eq!(
            rule("-d 10.0.0.0/8 -i cni0 -m comment --comment cocoon-net-drop -j DROP"),
            rule("-i cni0 -d 10.0.0.0/8 -m comment --comment cocoon-net-drop -j DROP")
        );
    }

    #[test]
    fn a_negation_makes_another_rule() {
        assert_ne!(rule("! -d 10.0.0.0/8 -i cni0 -j DROP"), rule("-d 10.0.0.0/8 -i cni0 -j DROP"));
        assert_ne!(rule("! -d 10.0.0.0/8 -i cni0 -j DROP"), rule("-d 10.0.0.0/8 ! -i cni0 -j DROP"));
        assert_eq!(rule("! -d 10.0.0.0/8 -j DROP").argument("-d"), None);
    }

    #[test]
    fn a_rule_is_ours_if_its_comment_equals_a_tag_and_only_then() {
        for ours in [
            "-i cni0 -m comment --comment cocoon-net-drop -j DROP",
            r#"-i cni0 -m comment --comment "cocoon-net" -j ACCEPT"#,
        ] {
            assert!(rule(ours).is_ours(), "{ours}");
        }
        for foreign in [
            "-i cni0 -j DROP",
            "-m comment --comment cocoon-net-drop2 -j DROP",
            "-m comment --comment my-cocoon-net-drop -j DROP",
            r#"-m comment --comment "was cocoon-net-drop once" -j DROP"#,
            r#"-m comment --comment "a --comment cocoon-net-drop" -j DROP"#,
            "-m comment --comment cocoon-net-drop -m comment --comment keep -j DROP",
            "-m string --string cocoon-net-drop --algo bm -j DROP",
        ] {
            assert!(!rule(foreign).is_ours(), "{foreign}");
        }
    }

    #[test]
    fn quotes_and_escapes_read_as_iptables_prints_them() {
        let rule = rule(r#"-m comment --comment "it\'s a \"name\": -j DROP" -j ACCEPT"#);
        assert_eq!(rule.argument("--comment"), Some(r#"it's a "name": -j DROP"#));
        assert_eq!(rule.argument("-j"), Some("ACCEPT"));
        assert!(Rule::parse(r#"--comment "open"#).is_err());
    }

    #[test]
    fn a_comment_that_looks_like_an_option_is_a_comment() {
        assert_eq!(rule("-m comment --comment -j -j DROP").argument("-j"), Some("DROP"));
        assert_eq!(rule("-m comment --comment ! -j DROP").argument("-j"), Some("DROP"));
    }
}
